//! The `contrastive` command.

fn main() -> std::process::ExitCode {
    contrastive::cli::main()
}
