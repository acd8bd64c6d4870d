"""One frozen model and hundreds of prompts: compiled, kept in a bank, mixed row by row."""
