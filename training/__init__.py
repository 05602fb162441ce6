"""Fine-tuning with the Matryoshka objective: `m3-train config.yaml`."""
