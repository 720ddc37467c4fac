"""What both packages share and what knows no framework: sentences, files, tables and drawings."""
