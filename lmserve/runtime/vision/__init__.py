"""Images in prompts: the model's image encoder, where its rows go, and the proof that it is done right."""
