"""Fine-tuning with the Matryoshka objective: `python -m training.finetune config.yaml`."""
