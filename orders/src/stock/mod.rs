//! What inventory must do with the stock of an order, after the order has changed.

pub mod sender;
pub mod store;

/// A stock command. Each may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The reservation no longer expires: there is an order.
    Confirm,
    /// The stock has left: the order was shipped.
    Commit,
    /// The stock is given back: the order was canceled.
    Release,
}

impl Command {
    /// As it stands in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Confirm => "confirm",
            Command::Commit => "commit",
            Command::Release => "release",
        }
    }

    /// The command of this name.
    pub fn parse(name: &str) -> Option<Command> {
        let all = [Command::Confirm, Command::Commit, Command::Release];
        all.into_iter().find(|command| command.as_str() == name)
    }
}
