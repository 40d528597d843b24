"""abyssal: the DeepSeek model line in one small, readable PyTorch library."""
