"""The PEFT method: gates on a base model, their files, and the checks of both."""
