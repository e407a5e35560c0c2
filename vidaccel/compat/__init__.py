"""What vidaccel uses of other libraries' private parts, one file a library: nowhere else is such a name (test).

Each entry says what it stands for and why there is no public way, and tests/compat/ fails with its name when an upgrade
moves it.
"""
