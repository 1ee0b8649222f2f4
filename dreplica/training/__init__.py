"""The step, the loop and the evaluation."""
