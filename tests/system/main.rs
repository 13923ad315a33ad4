//! All services together, from outside; and what must hold of the repository itself.

mod backup;
mod clock;
mod ecosystem;
mod framing;
mod inventory;
mod local_stack;
mod logs;
mod migrations;
mod movies_db;
mod provision;
mod purchase;
mod repo_lint;
mod secrets;
mod settings;
mod shell;
mod system;
