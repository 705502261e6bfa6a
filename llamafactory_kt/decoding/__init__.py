"""What makes a loaded model fast around its experts: attention, linear layers with LoRA, the output layer."""
