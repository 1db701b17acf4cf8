"""Questions asked of a captured model, one per file: where its work goes, and what could be done about it."""
