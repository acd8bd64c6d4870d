"""Files of the GPU evidence: CSV under comment lines that say what it is."""

import csv


def write_csv(file, rows, comments):
    """Dictionaries with the same keys."""
    with open(file, "w", newline="") as stream:
        stream.writelines(f"# {line}\n" for line in comments)
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file):
    """The comments and the dictionaries of a file of :func:`write_csv`; nothing of one that is not there."""
    if not file.exists():
        return [], []
    lines = file.read_text().splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(lines[len(comments) :]))
