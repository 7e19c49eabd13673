"""The method: Slerp + Text-Anchored-Tuning (arXiv 2405.00571). Pure: imports neither ray nor mlflow."""
