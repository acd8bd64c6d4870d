"""All that knows PEFT: its models on the engine, its encoders, its checkpoints."""
