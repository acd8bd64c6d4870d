"""Hugging Face models on the operators: attention, the engine that runs packed rows, SoftPromptModel."""
