"""Many runs of one experiment, and the table and plots of them."""
