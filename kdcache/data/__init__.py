"""From files and hub data sets to examples, texts and encoded batches."""
