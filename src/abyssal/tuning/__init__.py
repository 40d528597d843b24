"""Fine-tuning: all of a model, LoRA and QLoRA, only the experts that the data uses (ESFT), and preferences (DPO)."""
