"""What every HTML page of this project shares: its frame, its base style, how it shows numbers."""
