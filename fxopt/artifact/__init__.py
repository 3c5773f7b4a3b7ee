"""What an optimised model is as files: graphs as JSON, compiled code, a report, and who signed it."""
