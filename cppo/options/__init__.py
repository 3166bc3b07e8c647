"""Every option that a user sets, and how names and values are checked."""
