"""The tiers over every comparison, planted faults, known gaps, draws, and the mirror of the packages."""
