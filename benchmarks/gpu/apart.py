"""A function run by a process of its own, whose end is not that of the caller."""

import multiprocessing
import traceback


def apart(part, seconds):
    """What ``part()`` gives, by a process of its own that is killed when it takes longer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(part, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"not finished after {seconds} s")
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _send(part, sender):
    try:
        sender.send(part())
    except Exception as error:  # whatever it is: not every exception can be sent
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {error}")
