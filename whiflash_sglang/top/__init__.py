"""What servers do, live, from their routes: `reading` asks them, `view` shows it."""
