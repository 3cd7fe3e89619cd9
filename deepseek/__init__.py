"""deepseek-framework."""
