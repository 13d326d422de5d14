import tasks.super_resolution as tasks_super_resolution  # noqa: F401  BasicSR has to be repaired before a test imports it
