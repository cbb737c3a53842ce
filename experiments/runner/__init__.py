"""What a table or figure of the paper consists of, and what runs, collects and shows it."""
