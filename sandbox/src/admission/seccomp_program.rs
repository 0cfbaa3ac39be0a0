//! The seccomp profile of an OCI spec as a program for the kernel.
//!
//! ```text
//!  ld arch
//!  each architecture of the profile: jeq ARCH, else to the next one
//!     ld nr; a binary search for it; at the leaf:
//!        no conditions         ret ACTION
//!        conditions on args    64-bit comparisons, in halves; else the next rule; else the rest
//!     all others               ret DEFAULT; beyond the profile's last one: ret ERRNO(ENOSYS)
//!  no such architecture: ret KILL_PROCESS
//! ```
//!
//! Where rules of a profile overlap, the strictest counts; libseccomp is no stricter. A name that no
//! architecture has is passed over where it would allow (the call stays forbidden), and is an error
//! where it would forbid. System calls that are younger than the profile answer `ENOSYS` where it
//! denies by error, as runc has it: programs take that for an old kernel, and `EPERM` for a refusal.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::Deserialize;
use serde_json::Value;

/// Most instructions of a program (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// Set in the numbers of the x32 ABI, whose architecture is that of x86-64.
const X32_BIT: u32 = 0x4000_0000;
/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;
/// `SECCOMP_FILTER_FLAG_*`.
const FLAG_LOG: u32 = 2;
const FLAG_SPEC_ALLOW: u32 = 4;

const LD: u16 = 0x20;
const AND: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    flags: Option<Vec<String>>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Condition>>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Condition {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// One instruction, as `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    k: u32,
}

/// A rule that is checked: all conditions, then what is returned.
type Checked = (Vec<Condition>, u32);

/// A program and the flags that it is installed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compiled {
    pub(super) program: Vec<u8>,
    pub(super) flags: u32,
}

/// Compiles `linux.seccomp`.
///
/// # Errors
/// In words: what of the profile cannot be done here.
pub(super) fn compile(profile: &Value, machine: &str) -> Result<Compiled, String> {
    let profile: Profile =
        Deserialize::deserialize(profile).map_err(|error| format!("it is no profile: {error}"))?;
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let mut architectures = vec![native(machine)?];
    for name in profile.architectures.iter().flatten() {
        if let Some(known) = Architecture::named(name)
            && !architectures.contains(&known)
        {
            architectures.push(known);
        }
    }
    let rules = profile.syscalls.as_deref().unwrap_or_default();
    check_names(rules, default)?;
    let mut program = vec![load(ARCH)];
    for architecture in architectures {
        let block = block(architecture, rules, default)?;
        program.push(jump(JEQ, architecture.audit_number(), 1, 0));
        program.push(jump_over(&block));
        program.extend(block);
    }
    program.push(ret(KILL_PROCESS));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(format!("it takes {} instructions", program.len()));
    }
    Ok(Compiled {
        program: program.iter().flat_map(Instruction::bytes).collect(),
        flags: flags(profile.flags.as_deref())?,
    })
}

fn flags(names: Option<&[String]>) -> Result<u32, String> {
    let Some(names) = names else {
        // As runc does it: without it, processes lose speculation for nothing.
        return Ok(FLAG_SPEC_ALLOW);
    };
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | FLAG_SPEC_ALLOW),
        // Of how a filter is installed, and of listeners: nothing of what is allowed.
        "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => Ok(flags),
        other => Err(format!("the flag {other:?} is not known here")),
    })
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, String> {
    let data = |default: u32| errno.unwrap_or(default) & 0xffff;
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => 0,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_ERRNO" => ERRNO | data(EPERM),
        "SCMP_ACT_TRACE" => 0x7ff0_0000 | data(EPERM),
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_NOTIFY" => {
            return Err(
                "it asks a listener (SCMP_ACT_NOTIFY), which no restore connects".to_owned(),
            );
        }
        other => return Err(format!("the action {other:?} is not known here")),
    })
}

/// The kernel compares actions as signed numbers: the lowest is the strictest.
fn strictness(action: u32) -> i32 {
    (action & 0xffff_0000).cast_signed()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Architecture {
    X86,
    X86_64,
    Arm,
    Aarch64,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::X86, Self::X86_64, Self::Arm, Self::Aarch64];

    /// `SCMP_ARCH_X32` is refused whole, see [`X32_BIT`]; others than these never run here.
    fn named(name: &str) -> Option<Self> {
        match name {
            "SCMP_ARCH_X86" => Some(Self::X86),
            "SCMP_ARCH_X86_64" => Some(Self::X86_64),
            "SCMP_ARCH_ARM" => Some(Self::Arm),
            "SCMP_ARCH_AARCH64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// `AUDIT_ARCH_*`.
    fn audit_number(self) -> u32 {
        match self {
            Self::X86 => 0x4000_0003,
            Self::X86_64 => 0xc000_003e,
            Self::Arm => 0x4000_0028,
            Self::Aarch64 => 0xc000_00b7,
        }
    }

    fn number(self, name: &str) -> Option<u32> {
        let number = match self {
            Self::X86 => syscalls::x86::Sysno::from_str(name).ok()? as usize,
            Self::X86_64 => syscalls::x86_64::Sysno::from_str(name).ok()? as usize,
            Self::Arm => syscalls::arm::Sysno::from_str(name).ok()? as usize,
            Self::Aarch64 => syscalls::aarch64::Sysno::from_str(name).ok()? as usize,
        };
        u32::try_from(number).ok()
    }
}

fn native(machine: &str) -> Result<Architecture, String> {
    match machine {
        "x86_64" => Ok(Architecture::X86_64),
        "aarch64" => Ok(Architecture::Aarch64),
        other => Err(format!("profiles cannot be compiled for {other}")),
    }
}

fn check_names(rules: &[Rule], default: u32) -> Result<(), String> {
    for rule in rules {
        let strict = strictness(action(&rule.action, rule.errno_ret)?) < strictness(default);
        let unknown = rule.names.iter().find(|name| {
            let mut all = Architecture::ALL.into_iter();
            !all.any(|architecture| architecture.number(name).is_some())
        });
        if let Some(name) = unknown.filter(|_| strict) {
            return Err(format!("the system call {name:?} is not known here"));
        }
    }
    Ok(())
}

fn block(
    architecture: Architecture,
    rules: &[Rule],
    default: u32,
) -> Result<Vec<Instruction>, String> {
    let mut calls: BTreeMap<u32, Vec<Checked>> = BTreeMap::new();
    for rule in rules {
        let returned = action(&rule.action, rule.errno_ret)?;
        for number in rule
            .names
            .iter()
            .filter_map(|name| architecture.number(name))
        {
            let checked = calls.entry(number).or_default();
            checked.extend(
                alternatives(rule.args.as_deref().unwrap_or_default())
                    .into_iter()
                    .map(|conditions| (conditions, returned)),
            );
        }
    }
    let last = calls.keys().next_back().copied();
    let leaves: Vec<(u32, Vec<Instruction>)> = calls
        .into_iter()
        .map(|(number, rules)| Ok((number, leaf(rules, default)?)))
        .collect::<Result<_, String>>()?;
    let mut block = vec![load(NR)];
    if architecture == Architecture::X86_64 {
        block.push(jump(JGE, X32_BIT, 0, 1));
        block.push(ret(ERRNO | ENOSYS));
    }
    if let Some(last) = last.filter(|_| default & 0xffff_0000 == ERRNO) {
        block.push(jump(JGT, last, 0, 1));
        block.push(ret(ERRNO | ENOSYS));
    }
    block.extend(search(&leaves, default));
    Ok(block)
}

/// Conditions on different arguments must all hold. Of several on one argument one must: libseccomp
/// takes only one per argument, and runc makes a rule of each then.
fn alternatives(conditions: &[Condition]) -> Vec<Vec<Condition>> {
    let twice = conditions
        .iter()
        .enumerate()
        .any(|(at, it)| conditions[..at].iter().any(|other| other.index == it.index));
    if twice {
        return conditions.iter().map(|it| vec![it.clone()]).collect();
    }
    vec![conditions.to_vec()]
}

fn leaf(mut rules: Vec<Checked>, default: u32) -> Result<Vec<Instruction>, String> {
    rules.sort_by_key(|(_, action)| strictness(*action));
    let mut code = Vec::new();
    for (conditions, action) in rules {
        if conditions.is_empty() {
            // What comes after it is less strict.
            code.push(ret(action));
            return Ok(code);
        }
        let mut tests = Vec::new();
        for condition in &conditions {
            tests.extend(test(condition)?);
        }
        code.extend(assemble(tests, action)?);
    }
    code.push(ret(default));
    Ok(code)
}

/// Where a test goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    /// The next instruction.
    Next,
    /// The condition holds: continue this many instructions behind its last one.
    Holds(u8),
    /// It does not: behind the rule.
    Fails,
}

type Step = (u16, u32, To, To);

/// One condition: a 64-bit comparison without sign, the upper half first.
fn test(condition: &Condition) -> Result<Vec<Step>, String> {
    if condition.index > 5 {
        return Err(format!("there is no argument {}", condition.index));
    }
    let low = ARGS + condition.index * 8;
    let high = low + 4;
    let halves = |value: u64| {
        let word = |value: u64| u32::try_from(value & 0xffff_ffff).expect("it is masked");
        (word(value >> 32), word(value))
    };
    let (vh, vl) = halves(condition.value);
    let plain = |offset| (LD, offset, To::Next, To::Next);
    Ok(match condition.op.as_str() {
        "SCMP_CMP_EQ" => vec![
            plain(high),
            (JEQ, vh, To::Next, To::Fails),
            plain(low),
            (JEQ, vl, To::Next, To::Fails),
        ],
        "SCMP_CMP_NE" => vec![
            plain(high),
            (JEQ, vh, To::Next, To::Holds(2)),
            plain(low),
            (JEQ, vl, To::Fails, To::Next),
        ],
        op @ ("SCMP_CMP_GT" | "SCMP_CMP_GE") => vec![
            plain(high),
            (JGT, vh, To::Holds(3), To::Next),
            (JEQ, vh, To::Next, To::Fails),
            plain(low),
            (
                if op == "SCMP_CMP_GT" { JGT } else { JGE },
                vl,
                To::Next,
                To::Fails,
            ),
        ],
        op @ ("SCMP_CMP_LT" | "SCMP_CMP_LE") => vec![
            plain(high),
            (JGT, vh, To::Fails, To::Next),
            (JEQ, vh, To::Next, To::Holds(2)),
            plain(low),
            (
                if op == "SCMP_CMP_LT" { JGE } else { JGT },
                vl,
                To::Fails,
                To::Next,
            ),
        ],
        "SCMP_CMP_MASKED_EQ" => {
            let (dh, dl) = halves(condition.value_two);
            vec![
                plain(high),
                (AND, vh, To::Next, To::Next),
                (JEQ, dh, To::Next, To::Fails),
                plain(low),
                (AND, vl, To::Next, To::Next),
                (JEQ, dl, To::Next, To::Fails),
            ]
        }
        other => return Err(format!("the comparison {other:?} is not known here")),
    })
}

/// A rule: its tests, then its return.
fn assemble(steps: Vec<Step>, action: u32) -> Result<Vec<Instruction>, String> {
    // Behind the return.
    let end = steps.len() + 1;
    let mut code = Vec::with_capacity(end);
    for (at, (opcode, k, yes, no)) in steps.into_iter().enumerate() {
        let offset = |to| match to {
            To::Next => Ok(0),
            To::Holds(over) => Ok(over),
            To::Fails => u8::try_from(end - at - 1).map_err(|_| "a rule is too long".to_owned()),
        };
        code.push(jump(opcode, k, offset(yes)?, offset(no)?));
    }
    code.push(ret(action));
    Ok(code)
}

/// A binary search among sorted numbers, with what is done for each.
fn search(leaves: &[(u32, Vec<Instruction>)], default: u32) -> Vec<Instruction> {
    if leaves.len() <= 2 {
        let mut code = Vec::new();
        for (number, leaf) in leaves {
            code.push(jump(JEQ, *number, 1, 0));
            code.push(jump_over(leaf));
            code.extend(leaf);
        }
        code.push(ret(default));
        return code;
    }
    let (left, right) = leaves.split_at(leaves.len() / 2);
    let less = search(left, default);
    let mut code = vec![jump(JGE, right[0].0, 0, 1), jump_over(&less)];
    code.extend(less);
    code.extend(search(right, default));
    code
}

fn load(offset: u32) -> Instruction {
    jump(LD, offset, 0, 0)
}

fn ret(action: u32) -> Instruction {
    jump(RET, action, 0, 0)
}

fn jump_over(code: &[Instruction]) -> Instruction {
    let len = u32::try_from(code.len()).expect("a profile is far below 4 GiB");
    jump(JA, len, 0, 0)
}

fn jump(code: u16, k: u32, yes: u8, no: u8) -> Instruction {
    Instruction { code, yes, no, k }
}

impl Instruction {
    fn bytes(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&self.code.to_ne_bytes());
        bytes[2] = self.yes;
        bytes[3] = self.no;
        bytes[4..].copy_from_slice(&self.k.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the kernel would do: the instructions that are used here.
    fn run(program: &[u8], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut data = [nr.to_le_bytes(), arch.to_le_bytes()].concat();
        data.extend([0; 8]);
        data.extend(args.iter().flat_map(|arg| arg.to_le_bytes()));
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let code = &program[at * 8..at * 8 + 8];
            let (yes, no, k) = (code[2], code[3], word(&code[4..]));
            at += 1;
            let holds = match u16::from_le_bytes([code[0], code[1]]) {
                LD => {
                    a = word(&data[k as usize..k as usize + 4]);
                    continue;
                }
                AND => {
                    a &= k;
                    continue;
                }
                JA => {
                    at += k as usize;
                    continue;
                }
                JEQ => a == k,
                JGT => a > k,
                JGE => a >= k,
                RET => return k,
                other => panic!("{other:#x}"),
            };
            at += usize::from(if holds { yes } else { no });
        }
    }

    const X86_64: u32 = 0xc000_003e;
    const X86: u32 = 0x4000_0003;
    const DENIED: u32 = ERRNO | EPERM;

    fn profile() -> Value {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["read", "write", "openat", "seccomp", "close", "no_such_call"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                { "names": ["personality"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                { "names": ["clone"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 2_114_060_288_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
                { "names": ["socket"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_NE" }] },
                { "names": ["kill"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7,
                  "args": [{ "index": 1, "value": 9, "op": "SCMP_CMP_GE" }] }
            ]
        })
    }

    #[test]
    fn a_profile_does_what_it_says() {
        let compiled = compile(&profile(), "x86_64").unwrap();
        assert_eq!(compiled.flags, FLAG_SPEC_ALLOW);
        let call = |arch, nr, args: &[u64]| {
            let mut all = [0; 6];
            all[..args.len()].copy_from_slice(args);
            run(&compiled.program, arch, nr, all)
        };
        for (nr, args, wanted) in [
            (0, &[][..], ALLOW),
            (3, &[], ALLOW),
            (2, &[], DENIED),
            (435, &[], ERRNO | ENOSYS),
            (435 + 1, &[], ERRNO | ENOSYS),
            (135, &[8], ALLOW),
            (135, &[9], DENIED),
            (135, &[8 | 1 << 40], DENIED),
            (56, &[0x11], ALLOW),
            (56, &[0x1000_0000], DENIED),
            (41, &[2], ALLOW),
            (41, &[40], DENIED),
            (41, &[40 | 1 << 32], ALLOW),
            (62, &[1, 8], ALLOW),
            (62, &[1, 9], ERRNO | 7),
            (62, &[1, 1 << 33], ERRNO | 7),
            (X32_BIT, &[], ERRNO | ENOSYS),
        ] {
            assert_eq!(call(X86_64, nr, args), wanted, "{nr} {args:?}");
        }
        // read is 3 on x86, 0 is restart_syscall.
        assert_eq!(call(X86, 3, &[]), ALLOW);
        assert_eq!(call(X86, 0, &[]), DENIED);
        assert_eq!(call(0xc000_00b7, 0, &[]), KILL_PROCESS);
    }

    #[test]
    fn every_comparison_is_of_64_bits() {
        let big = 5 << 32 | 7;
        for (op, smaller, equal, larger) in [
            ("EQ", false, true, false),
            ("NE", true, false, true),
            ("LT", true, false, false),
            ("LE", true, true, false),
            ("GE", false, true, true),
            ("GT", false, false, true),
        ] {
            let profile = json!({ "defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [
                { "names": ["read"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 5, "value": big, "op": format!("SCMP_CMP_{op}") }] }] });
            let program = compile(&profile, "x86_64").unwrap().program;
            for (value, wanted) in [
                (big - 1, smaller),
                (4 << 32 | 9, smaller),
                (big, equal),
                (big + 1, larger),
                (6 << 32, larger),
            ] {
                let found = run(&program, X86_64, 0, [0, 0, 0, 0, 0, value]);
                assert_eq!(found == ALLOW, wanted, "{value:#x} {op}");
            }
        }
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        for (change, said) in [
            (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "listener"),
            (json!({ "defaultAction": "SCMP_ACT_X" }), "SCMP_ACT_X"),
            (json!({}), "no profile"),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    { "names": ["from_the_future"], "action": "SCMP_ACT_ERRNO" }] }),
                "from_the_future",
            ),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["X"] }),
                "flag",
            ),
        ] {
            let error = compile(&change, "x86_64").unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(compile(&profile(), "s390x").is_err());
        assert!(compile(&profile(), "aarch64").is_ok());
    }
}
