"""Meeting a budget: of MACs by calibration, of milliseconds by schedules and dials."""
