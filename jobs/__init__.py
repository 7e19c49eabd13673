"""The Ray programs, one file a job: `ray job submit -- python jobs/<job>.py`."""
