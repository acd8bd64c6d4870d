"""Prefix-Tuning (Li and Liang 2021, arXiv 2101.00190): are reviews of movies positive or negative?

Keys and values of 20 virtual tokens in every layer of SmolLM2-135M-Instruct, started from those of a real text in the
frozen model, trained on real reviews. What examples/data.py needs has to be installed.

    python examples/prefix_tuning.py
"""

from pathlib import Path

from data import train_on

if __name__ == "__main__":
    train_on(
        "movies",
        Path("prefix_tuning"),
        method="prefix-tuning",
        init="text",
        steps=100,
        init_text="Say whether the review of the movie is positive or negative: "
        "did its author like the movie or not?\n",
    )
