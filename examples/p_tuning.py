"""P-Tuning (Liu et al. 2021, arXiv 2103.10385): what kind of answer does a question ask for?

A prompt of 20 virtual tokens that a bidirectional LSTM makes, in front of SmolLM2-135M-Instruct, trained on the TREC
questions. What examples/data.py needs has to be installed.

    python examples/p_tuning.py
"""

from pathlib import Path

from data import train_on

if __name__ == "__main__":
    train_on("questions", Path("p_tuning"), method="p-tuning", encoder="lstm", steps=150)
