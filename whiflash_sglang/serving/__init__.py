"""Servers as processes: started, waited for, asked together, ended with their owner."""
