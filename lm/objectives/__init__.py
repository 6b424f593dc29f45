"""What is predicted from what: corruption on the host, loss on the device."""
