// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the header's constants from the Rust sources: error codes, flags, and our own.

use std::collections::BTreeMap;
use std::path::Path;

use syn::parse::ParseStream;
use syn::punctuated::Punctuated;
use syn::{
    Attribute, BinOp, Expr, ExprStruct, FieldValue, Ident, Item, Lit, LitInt, Member, Token,
};

use crate::sources::{given_to, parse};

/// The files that declare them.
pub const SOURCES: [&str; 3] = ["src/error.rs", "src/model/flags.rs", "src/ffi/abi.rs"];

/// A constant: its name in C, and its value in Rust.
type Constant = (String, i64);

/// Reads all constants.
pub fn read() -> Result<Vec<Constant>, String> {
    let [errors, flags, own] = SOURCES.map(Path::new);
    let codes = parse(errors)?.items;
    let domain = values(&codes).remove("DOMAIN").ok_or("src/error.rs has no DOMAIN")?;
    let mut all = vec![("VIR_ERR_OK".into(), 0), ("VIR_FROM_QEMU".into(), domain)];
    all.extend(given_to("codes", errors, &codes, lines)?);
    all.extend(
        of_tables(&parse(flags)?.items)
            .ok_or("src/model/flags.rs has other tables than the build can read")?,
    );
    all.extend(given_to("constants", own, &parse(own)?.items, lines)?);
    Ok(all)
}

/// Parses lines of `NAME = 1` or `Variant = NAME = 1`.
fn lines(input: ParseStream) -> syn::Result<Vec<Constant>> {
    let line = |input: ParseStream| {
        input.call(Attribute::parse_outer)?;
        let mut name = input.parse::<Ident>()?;
        input.parse::<Token![=]>()?;
        if input.peek(Ident) {
            name = input.parse()?;
            input.parse::<Token![=]>()?;
        }
        Ok((name.to_string(), input.parse::<LitInt>()?.base10_parse()?))
    };
    let lines = Punctuated::<_, Token![,]>::parse_terminated_with(input, line)?;
    Ok(lines.into_iter().collect())
}

/// The values of the constants that are numbers.
fn values(items: &[Item]) -> BTreeMap<String, i64> {
    let number = |item: &Item| match item {
        Item::Const(found) => Some((found.ident.to_string(), value(&found.expr)?)),
        _ => None,
    };
    items.iter().filter_map(number).collect()
}

/// The value of `1` or `1 << 2`.
fn value(expression: &Expr) -> Option<i64> {
    match expression {
        Expr::Lit(found) => match &found.lit {
            Lit::Int(number) => number.base10_parse().ok(),
            _ => None,
        },
        Expr::Binary(found) if matches!(found.op, BinOp::Shl(_)) => {
            value(&found.left)?.checked_shl(value(&found.right)?.try_into().ok()?)
        }
        _ => None,
    }
}

/// The flags of all tables. Each is a `rule("NAME", CONSTANT, …)`, and its name in C begins with
/// the prefix of its table. `None` if the tables are written differently.
fn of_tables(items: &[Item]) -> Option<Vec<Constant>> {
    let mut numbers = values(items);
    for item in items {
        if let Item::Mod(module) = item
            && let Some((_, items)) = &module.content
        {
            let in_module = |(name, value)| (format!("{}::{name}", module.ident), value);
            numbers.extend(values(items).into_iter().map(in_module));
        }
    }
    let tables: Option<Vec<_>> =
        items.iter().filter_map(table).map(|table| of_table(table, &numbers)).collect();
    tables.filter(|tables| !tables.is_empty()).map(|tables| tables.concat())
}

fn table(item: &Item) -> Option<&ExprStruct> {
    match item {
        Item::Const(found) => match &*found.expr {
            Expr::Struct(table) if table.path.is_ident("Table") => Some(table),
            _ => None,
        },
        _ => None,
    }
}

fn of_table(table: &ExprStruct, numbers: &BTreeMap<String, i64>) -> Option<Vec<Constant>> {
    let field = |name: &str| {
        let is_it = |field: &&FieldValue| matches!(&field.member, Member::Named(it) if it == name);
        table.fields.iter().find(is_it).map(|field| &field.expr)
    };
    let prefix = text(field("prefix")?)?;
    let Expr::Reference(rules) = field("rules")? else { return None };
    let Expr::Array(rules) = &*rules.expr else { return None };
    let rule = |rule: &Expr| {
        let Expr::Call(rule) = rule else { return None };
        let Expr::Path(constant) = rule.args.get(1)? else { return None };
        let path: Vec<_> =
            constant.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let name = format!("{prefix}{}", text(rule.args.first()?)?);
        Some((name, *numbers.get(&path.join("::"))?))
    };
    rules.elems.iter().map(rule).collect()
}

fn text(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Lit(found) => match &found.lit {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}
