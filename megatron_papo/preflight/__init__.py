"""What is checked before a rank starts: settings against inputs, layout and machine. Imports no torch."""
