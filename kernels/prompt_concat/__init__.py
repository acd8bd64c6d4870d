"""prompt_concat in Triton: a gather of rows, and the sum over the readers of each row by an inverse index."""
