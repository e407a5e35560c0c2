"""Full or predicted at each step: the hook on the trunk, the policies and schedules that choose, and `attach`."""
