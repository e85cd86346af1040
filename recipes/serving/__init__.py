"""An OpenAI-compatible endpoint in which many chats share one batch, each with a memory of fixed size."""
