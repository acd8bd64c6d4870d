"""Files of the GPU evidence: CSV under comment lines that say what it is."""

import csv


def write_csv(file, rows, comments):
    """Dictionaries with the same keys."""
    with open(file, "w", newline="") as stream:
        stream.writelines(f"# {line}\n" for line in comments)
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
