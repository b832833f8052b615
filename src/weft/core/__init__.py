"""The mathematics of LoRA. Knows torch; knows neither transformers nor files."""
