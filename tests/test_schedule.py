"""The schedules of prefix_attention against what they are, written with loops."""

import torch
from fastprompt.kernels.prefix_attention import schedule as gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt import Sequences
from fastprompt.ops.prefix_attention.schedule import CpuSchedule, cpu_schedule

CACHE, PAGE = 400, 8  # columns


@st.composite
def batches(draw, longest=300):
    """Sequences and the keys that a prefix has room for."""
    length = st.one_of(st.integers(0, 12), st.integers(0, longest))
    lengths = draw(st.lists(length, max_size=30))
    prefixes, room = draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 7, 100]))
    options = {}
    if draw(st.booleans()):
        options["prefix_ids"] = [draw(st.integers(-1, prefixes - 1)) for _ in lengths]
    if draw(st.booleans()):
        options["prefix_lens"] = [draw(st.integers(0, room)) for _ in range(prefixes)]
    if draw(st.booleans()):
        options["gaps"] = [draw(st.integers(0, 5)) for _ in lengths]
    kind = draw(st.sampled_from(["packed", "padded", "decode", "runs"]))
    if kind == "packed":
        return Sequences.packed([sum(lengths[:i]) for i in range(len(lengths) + 1)], **options), room
    if kind == "padded":
        starts = [draw(st.integers(0, 3)) for _ in lengths]
        return Sequences.padded(starts, lengths, max(lengths, default=0) + 3, **options), room
    if kind == "decode":
        if draw(st.booleans()):
            options["queries"] = [draw(st.integers(0, n)) for n in lengths]
        if draw(st.booleans()):
            options["starts"] = [draw(st.integers(0, 5)) for _ in lengths]
        if draw(st.booleans()):
            page, columns = st.integers(0, 9), -(-(longest + 5) // PAGE)
            options["pages"] = [[draw(page)] * columns for _ in lengths]
        return Sequences.decode(lengths, **options), room
    starts = [sum(lengths[:i]) + 2 * i for i in range(len(lengths))]  # from the last run to the first
    return Sequences.runs(starts[::-1], lengths[::-1], sum(lengths) + 2 * len(lengths), **options), room


def described(seq, room):
    """``(number, start, length, prefix, its length, gap)`` of every sequence, as ints; prefix -1: none."""
    for number, (start, length) in enumerate(zip(seq.starts.tolist(), seq.lengths.tolist())):
        prefix = 0 if seq.prefix_ids is None else int(seq.prefix_ids[number])
        used = 0
        if prefix >= 0 and room:
            used = room if seq.prefix_lens is None else int(seq.prefix_lens[prefix])
        gap = 0 if seq.gaps is None else int(seq.gaps[number])
        yield number, start, length, prefix if used else -1, used, gap


def asked(seq):
    """The number of queries of every sequence."""
    if seq.queries is not None:
        return seq.queries.tolist()
    return [min(n, 1) if seq.kind == "decode" else n for n in seq.lengths.tolist()]


def block_of(seq):
    """Columns of a row of the cache, or of a page."""
    return None if seq.kind != "decode" else CACHE if seq.pages is None else PAGE


def first_column(seq, number):
    """Where the keys of a sequence begin, in the columns of the caches or pages of all of them."""
    blocks = 1 if seq.pages is None else seq.pages.shape[1]
    return number * blocks * block_of(seq) + (0 if seq.key_starts is None else int(seq.key_starts[number]))


def seen(first, end, length, causal, window):
    """The own keys that queries ``first`` to ``end`` see: the first and the end of them."""
    begin, stop = 0, end if causal else length
    if window is not None:
        begin, stop = max(0, first - window + 1), min(stop, end - 1 + window)
    return begin, stop


def aligned(keys):
    return -(-keys // 32) * 32


def cpu_definition(seq, *, causal, window, room, heads, kv_heads):
    """The tables of :class:`CpuSchedule`, as lists."""
    decode, group = seq.kind == "decode", heads // kv_heads
    queries_of = asked(seq)
    sequences = [s for s in described(seq, room) if queries_of[s[0]]]
    if window is not None and window >= max(
        (used + gap + n for _, _, n, _, used, gap in described(seq, room)), default=0
    ):
        window = None
    rows_of = {s: queries_of[s[0]] for s in sequences}
    queries = sum(rows_of.values())
    pairs = sum(rows * (s[4] + s[2]) for s, rows in rows_of.items())
    wanted = -(-min(8, pairs * heads // (1 << 14) + 1) // kv_heads)
    share = -(-queries * group // wanted)
    tile_rows = max(1, min(192, max(48, share)) // group)
    chunk_rows = max(1, min(1024, share) // group)

    prefixes, chunks = [], []
    for prefix in sorted({s[3] for s in sequences}):
        readers = [s for s in sequences if s[3] == prefix]
        used, number = readers[0][4], -1
        if prefix >= 0:
            number = len(prefixes)
            prefixes.append((prefix, used))
        tiles, free = [], 0  # of (sequence, first query, end)
        for s in readers:
            rows = rows_of[s]
            before = s[2] - rows
            if rows > tile_rows:
                size = -(-rows // -(-rows // tile_rows))
                tiles += [[(s, before + i, before + min(i + size, rows))] for i in range(0, rows, size)]
                free = 0
                continue
            if rows > free:
                tiles.append([])
                free = tile_rows
            tiles[-1].append((s, before, before + rows))
            free -= rows
        sizes = [sum(end - first for _, first, end in tile) for tile in tiles]
        count = max(1, round(sum(sizes) / chunk_rows))
        dealt, done = [], 0
        for tile, size in zip(tiles, sizes):
            if done * count >= sum(sizes) * len(dealt):
                dealt.append([])
            dealt[-1].append(tile)
            done += size
        chunks += [(number, used, tiles) for tiles in dealt]

    def cost(chunk):
        _, used, tiles = chunk
        total = 0
        for s, first, end in sum(tiles, []):
            begin, stop = seen(first, end, s[2], causal, window)
            total += (end - first) * (used + (stop - begin) / (2 if causal and not decode else 1))
        return total

    chunks.sort(key=cost, reverse=True)

    spans = {}  # (chunk, sequence) -> its queries there
    for i, (_, _, tiles) in enumerate(chunks):
        for s, first, end in sum(tiles, []):
            spans[i, s] = spans.get((i, s), (first,))[0], end
    base = {s: first_column(seq, s[0]) if decode else s[1] for s in sequences}
    splits, parts, part_of, split_parts = [], [], {}, 0
    for s in dict.fromkeys(s for _, s in spans):
        places = [(*seen(*span, s[2], causal, window), i) for (i, other), span in spans.items() if other == s]
        if len(places) < 2:
            continue
        splits.append([base[s], s[2], len(parts), len(parts) + len(places)])
        for begin, end, i in sorted(places, key=lambda place: place[1]):
            part_of[i, s] = split_parts
            parts.append([begin, end, split_parts])
            split_parts += end - begin

    segments, tile_table, chunk_table, prefix_parts, most_rows, most_slots, longest = [], [], [], 0, 0, 0, 0
    for i, (number, used, tiles) in enumerate(chunks):
        chunk_table.append([len(tile_table), len(tile_table) + len(tiles), number, prefix_parts])
        prefix_parts += used
        for tile in tiles:
            tile_table.append([len(segments), len(segments) + len(tile)])
            slot = 0
            for s, first, end in tile:
                span = spans[i, s]
                begin, stop = seen(*span, s[2], causal, window)
                row = s[1] + first - (s[2] - rows_of[s])
                load, store = int(first == span[0]), int(end == span[1])
                part = part_of.get((i, s), -1)
                segments.append([row, end - first, first, base[s], begin, stop, slot, s[5], load, store, part])
                slot += aligned(stop - begin)
                longest = max(longest, aligned(stop - begin))
            most_slots = max(most_slots, slot)
            most_rows = max(most_rows, sum(end - first for _, first, end in tile))
    # A prefix of a bank is one piece, read by each of its chunks.
    prefix_table, links, pieces, readers, prefix_slots = [], [], [], [], 0
    for number, (prefix, used) in enumerate(prefixes):
        parts_of_it = [[part] for _, _, of, part in chunk_table if of == number]
        prefix_table.append([number, number + 1, used])
        links.append([number, 0])
        pieces.append([1, prefix, 0, used, prefix_slots, len(readers), len(readers) + len(parts_of_it)])
        readers += parts_of_it
        prefix_slots += aligned(used)
    block, learned = block_of(seq) or 1 << 62, sum(used for _, used in prefixes)
    sizes = [most_rows, most_slots, prefix_slots, prefix_parts, split_parts, longest, block, learned]
    pages = [] if seq.pages is None else seq.pages.tolist()
    of_prefixes = prefix_table, links, pieces, readers
    return CpuSchedule(segments, tile_table, chunk_table, *of_prefixes, splits, parts, pages, sizes)


FLAGS = dict(
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 5, 40, 1000]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 8, 200]),
)


@given(batches(), st.fixed_dictionaries(FLAGS))
@settings(max_examples=300, deadline=None)
def test_the_cpu_schedule_is_its_definition(batch, flags):
    seq, room = batch
    group = flags.pop("group")
    options = dict(flags, room=room, heads=group * flags["kv_heads"])
    found, exact = cpu_schedule(seq, **options, block=block_of(seq)), cpu_definition(seq, **options)
    for name, table, expected in zip(CpuSchedule._fields, found, exact):
        assert table.dtype == torch.int64 and table.is_contiguous(), name
        assert table.tolist() == expected, name


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_of_chains_are_their_keys(data):
    """No key is in two pieces, and a piece is read by every chunk of the chains that it is part of, in order."""
    room, rows = data.draw(st.sampled_from([0, 1, 3])), 60
    learned = st.lists(st.integers(-2 * room, -1), max_size=3) if room else st.just([])
    run = st.tuples(st.integers(0, rows - 1), st.integers(1, 20)).map(lambda x: [*range(x[0], min(sum(x), rows))])
    chains = [data.draw(learned) + sum(data.draw(st.lists(run, max_size=3)), []) for _ in range(3)]
    chains.append(chains[0] + data.draw(run))
    used, width = [len(chain) for chain in chains], max(map(len, chains))
    table = torch.tensor([chain + [999] * (width - len(chain)) for chain in chains]).view(len(chains), width)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    ids = [data.draw(st.integers(-1, 3)) for _ in lengths]
    seq = Sequences.packed([sum(lengths[:i]) for i in range(len(lengths) + 1)], ids, used, chains=table)
    found = cpu_schedule(seq, causal=True, window=None, room=room, heads=400, kv_heads=2)
    pieces = []
    for is_learned, base, row, length, slot, *_ in found.pieces.tolist():
        first = -1 - base * room - row if is_learned else base
        pieces.append([first + (-i if is_learned else i) for i in range(length)])
        assert slot % 32 == 0
    keys = sum(pieces, [])
    assert len(keys) == len(set(keys))
    readers = [[] for _ in pieces]
    chunk_prefix = {}  # by what its tiles' segments are behind
    for begin, _, prefix, part in found.chunks.tolist():
        row = found.segments[found.tiles[begin, 0], 0]
        chain = ids[int(torch.searchsorted(seq.starts, row, right=True)) - 1]
        if prefix < 0:
            assert chain < 0 or not chains[chain]
            continue
        first, last, length = found.prefixes[prefix].tolist()
        links = found.links[first:last].tolist()
        assert sum([pieces[piece] for piece, _ in links], []) == chains[chain] and length == len(chains[chain])
        assert chunk_prefix.setdefault(prefix, chain) == chain
        for piece, offset in links:
            readers[piece].append(part + offset)
    for (*_, begin, end), expected in zip(found.pieces.tolist(), readers, strict=True):
        assert found.readers[begin:end, 0].tolist() == expected


@given(batches(longest=40), st.booleans(), st.sampled_from([None, 1, 9]), st.data())
@settings(max_examples=200, deadline=None)
def test_the_gpu_schedule_is_its_definition(batch, causal, window, data):
    seq, room = batch
    decode, queries_of = seq.kind == "decode", asked(seq)
    sequences = [s for s in described(seq, room) if queries_of[s[0]]]
    sequences.sort(key=lambda s: (s[3], s[1]))
    keys = [(s, j) for s in sequences for j in range(s[2])]  # in virtual order
    queries = [(s, j) for s, j in keys if j >= s[2] - queries_of[s[0]]]
    first = {s: sum(other[2] for other in sequences[:i]) for i, s in enumerate(sequences)}
    bounds = [seen(j, j + 1, s[2], causal, window) for s, j in queries]
    table, lengths = torch.tensor(list(described(seq, room))).view(-1, 6)[:, [1, 2, 3, 5]], seq.prefix_lengths(room)
    host = seq.host
    cache = gpu.Cache(block_of(seq), host.queries, host.key_starts, host.pages) if decode else None
    made = gpu.make_batch(table, lengths, causal=causal, window=window, cache=cache)
    assert made.query_rows.tolist() == [s[1] + j - (s[2] - queries_of[s[0]]) for s, j in queries]
    assert made.key_rows.tolist() == [place(seq, s[0], j) if decode else s[1] + j for s, j in keys]
    assert made.low.tolist() == [first[s] + low for (s, _), (low, _) in zip(queries, bounds)]
    assert made.high.tolist() == [first[s] + high for (s, _), (_, high) in zip(queries, bounds)]

    rows, block, chunk = (data.draw(st.sampled_from(sizes)) for sizes in ([1, 7, 64], [4, 16], [5, 60]))
    tiles = []
    for prefix in sorted({s[3] for s in sequences}):
        numbers = [i for i, (s, _) in enumerate(queries) if s[3] == prefix]
        tiles += [(numbers[i], min(numbers[i] + rows, numbers[-1] + 1)) for i in range(0, len(numbers), rows)]
    table = gpu.query_tiles(made, rows)
    assert [tuple(row) for row in table[:, :2].tolist()] == tiles
    for q0, q1, k0, k1, prefix, p0, p1, _ in table.tolist():
        of_tile = range(q0, q1)
        assert (k0, k1) == (min(made.low[i] for i in of_tile), max(made.high[i] for i in of_tile))
        s = queries[q0][0]
        assert (prefix, p1) == (max(s[3], 0), s[4])
        visible = [0 if window is None else s[4] + s[5] + j - window + 1 for s, j in queries[q0:q1]]
        assert p0 == min(max(min(visible), 0), s[4])
    if decode:
        check_decode_items(made, queries, rows, block)
        return

    # Every query and key of every prefix meet in one item, and so do all keys in one.
    items, slots, count = gpu.backward_items(
        made, query_rows=rows, key_block=block, chunk_rows=chunk, dq=True, dkv=True, dprefix=True
    )
    met = [
        (query, prefix, key)
        for role, q0, q1, k0, k1, prefix, _, _ in items.tolist() if role == gpu.PREFIX
        for query in range(q0, q1) for key in range(k0, k1)
    ]  # fmt: skip
    assert sorted(met) == [(i, s[3], key) for i, (s, _) in enumerate(queries) for key in range(s[4])]
    check_key_items(made, items)

    # The partial sums of a block of a prefix stand in slots side by side, and no slot is another's.
    found = gpu.slot_table(slots, 4, room, block)
    used = [slot for begin, end, _ in found.reshape(-1, 3).tolist() for slot in range(begin, end)]
    assert sorted(used) == list(range(count))
    for row in items.tolist():
        if row[0] == gpu.PREFIX:
            begin, end, length = found[row[5], row[3] // block].tolist()
            assert begin <= row[6] < end and row[4] <= length


def place(seq, number, key):
    """Where a key stands among the columns of all rows, or pages, of the cache."""
    column = first_column(seq, number) + key
    if seq.pages is None:
        return column
    return int(seq.pages.flatten()[column // PAGE]) * PAGE + column % PAGE


def check_key_items(made, items):
    """Every own key is in one item, which runs over all queries that see it."""
    of_keys = [row for row in items.tolist() if row[0] == gpu.KEYS]
    assert sorted(key for row in of_keys for key in range(row[3], row[4])) == list(range(made.keys))
    for _, q0, q1, k0, k1, *_ in of_keys:
        meet = [i for i in range(made.queries) if max(made.low[i], k0) < min(made.high[i], k1)]
        assert not meet or (q0 <= meet[0] and meet[-1] < q1)


@given(batches(longest=200), st.lists(st.sampled_from([0, 1, 5, 40, 300]), min_size=30, max_size=30), st.booleans())
@settings(max_examples=150, deadline=None)
def test_in_cross_attention_a_query_meets_the_keys_of_its_sequence(batch, lengths, backwards):
    seq, room = batch
    if seq.kind == "decode":
        return
    lengths = lengths[: len(seq.starts)]
    starts = [sum(lengths[i + 1 :] if backwards else lengths[:i]) for i in range(len(lengths))]
    key_seq = Sequences.runs(starts, lengths, sum(lengths))
    expected, read = {}, []
    for number, start, count, _, used, _ in described(seq, room):
        keys = list(range(starts[number], starts[number] + lengths[number]))
        expected |= {row: keys for row in range(start, start + count) if keys or used}
        read += keys if count else []

    made = cpu_schedule(seq, causal=False, window=None, room=room, heads=6, kv_heads=2, key_seq=key_seq)
    met, written = {}, [base + key for base, length, *_ in made.splits.tolist() for key in range(length)]
    for row, rows, _, base, begin, end, _, _, _, store, part in made.segments.tolist():
        keys = list(range(base + begin, base + end))
        assert not met.keys() & range(row, row + rows)
        met |= dict.fromkeys(range(row, row + rows), keys)
        written += keys if store and part < 0 else []
    assert met == expected and sorted(written) == sorted(read)

    table, used = torch.tensor(list(described(seq, room))).view(-1, 6)[:, [1, 2, 3, 5]], seq.prefix_lengths(room)
    keys = list(zip(starts, lengths))
    made = gpu.make_batch(table, used, causal=False, window=None, key_sequences=keys)
    intervals = zip(made.query_rows.tolist(), made.low, made.high)
    assert {row: made.key_rows[low:high].tolist() for row, low, high in intervals} == expected
    assert sorted(made.key_rows.tolist()) == sorted(read)
    for q0, q1, k0, k1, *_ in gpu.query_tiles(made, 7).tolist():
        assert (k0, k1) == (made.low[q0:q1].min(), made.high[q0:q1].max())
    sizes = dict(query_rows=7, key_block=16, chunk_rows=60)
    check_key_items(made, gpu.backward_items(made, **sizes, dq=False, dkv=True, dprefix=False)[0])


def test_a_window_that_ends_in_the_prefix_leaves_later_queries_fewer_parts():
    """The second tile of queries reads the second half of the prefix alone, and starts inside of a sequence."""
    seq, room = Sequences.decode([1, 7], queries=[1, 7]), 7
    sequences = list(described(seq, room))
    table, lengths = torch.tensor(sequences).view(-1, 6)[:, [1, 2, 3, 5]], seq.prefix_lengths(room)
    cache = gpu.Cache(block_of(seq), seq.host.queries, seq.host.key_starts, seq.host.pages)
    made = gpu.make_batch(table, lengths, causal=True, window=9, cache=cache)
    check_decode_items(made, [(s, j) for s in sequences for j in range(s[2])], 7, 4)


def check_decode_items(made, queries, rows, split):
    """Every query meets every key that it sees of its prefix and of its own once, in parts numbered from 0."""
    items, parts = gpu.decode_items(made, rows=rows, prefix_split=split, own_split=split)
    met, numbers = {i: [] for i in range(len(queries))}, {i: [] for i in range(len(queries))}
    for q0, q1, k0, k1, prefix, number, *_ in items.tolist():
        for query in range(q0, q1):
            met[query] += [(prefix, key) for key in range(k0, k1)]
            numbers[query].append(number)
    for i, (s, _) in enumerate(queries):
        own = [(-1, key) for key in range(made.low[i], made.high[i])]
        of_sequence = [(-1, key) for key in range(*made.spans[:2, i])]  # other queries of a tile may see more
        shared = [(s[3], key) for key in range(s[4])]
        assert set(own) <= set(met[i]) <= set(of_sequence + shared) and len(set(met[i])) == len(met[i])
        assert set(shared[made.prefix_low[i] :]) <= set(met[i])
        assert sorted(numbers[i]) == list(range(parts[i + 1] - parts[i]))
