use contrastive::*;
fn main() {
    let name = std::env::args().nth(1).unwrap();
    let toml = std::env::args().nth(2).unwrap_or_default();
    let mut flags: config::Partial = toml::from_str(&toml).unwrap();
    flags.experiment = Some(name.clone());
    let c = experiments::resolve(None, flags).unwrap();
    let mut cpu: Cpu = Cpu::new();
    let dir = std::path::PathBuf::from(format!("/tmp/runs/{name}"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let o = experiments::run(&mut cpu, "cpu", &c, &dir, false, &stop, &mut |_| {}).unwrap();
    println!("{}", serde_json::Value::Object(o.report.values));
    for l in o.report.table {
        println!("{l}");
    }
}
