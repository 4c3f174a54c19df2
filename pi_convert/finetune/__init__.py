"""Fine-tuning after interpolation: a recipe, windows of text, and the training itself."""
