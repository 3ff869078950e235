"""What a run reports: metrics, the results table, the HTML page and the model card."""
