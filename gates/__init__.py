"""What is in the model: the gates, the attention that uses them, and the bounded cache."""
