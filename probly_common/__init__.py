"""The code that both packages share and that knows no framework: sentences, files, tables and drawings."""
