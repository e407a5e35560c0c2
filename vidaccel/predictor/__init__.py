"""What stands in for the trunk on predicted steps: the learned network, and cheaper forecasters to compare it with."""
