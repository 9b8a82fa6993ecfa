"""nanochat: train your own ChatGPT, end to end, and understand every line of it."""
