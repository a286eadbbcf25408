"""Train: a LoRA adapter by TRL's SFTTrainer on PEFT, in a process of its own."""
