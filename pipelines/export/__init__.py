"""Multi-view pairs in the formats of other trainers: `customcontrast export-pairs`."""
