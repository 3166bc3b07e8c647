"""What the HTML pages have in common: self-contained, without a script, in the reader's theme."""
