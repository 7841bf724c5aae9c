// SPDX-License-Identifier: LGPL-2.1-or-later

//! `#[test]` and `#[process]` register a function with the test program. `instantsnap-testkit`
//! exports them, and its module `program` describes them.

use proc_macro::{TokenStream, TokenTree};

/// Marks a test, which runs in a process of its own. `#[test(long)]` tests are started before the
/// others.
#[proc_macro_attribute]
pub fn test(arguments: TokenStream, function: TokenStream) -> TokenStream {
    let kind = match arguments.to_string().as_str() {
        "" => "Kind::Test { long: false }",
        "long" => "Kind::Test { long: true }",
        other => panic!("#[test({other})]: there is #[test] and #[test(long)]"),
    };
    registered(function, kind)
}

/// Marks a function that a test runs in another process of this program, by `program::process()`.
#[proc_macro_attribute]
pub fn process(_: TokenStream, function: TokenStream) -> TokenStream {
    registered(function, "Kind::Process")
}

fn registered(function: TokenStream, kind: &str) -> TokenStream {
    let is_fn =
        |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    let mut tokens = function.clone().into_iter().skip_while(|token| !is_fn(token));
    let name = tokens.nth(1).expect("a function has a name");
    let entry = format!(
        "::instantsnap_testkit::inventory::submit! {{
            ::instantsnap_testkit::program::Entry {{
                module: module_path!(),
                name: stringify!({name}),
                run: {name},
                kind: ::instantsnap_testkit::program::{kind},
            }}
        }}"
    );
    let entry: TokenStream = entry.parse().expect("this is Rust");
    function.into_iter().chain(entry).collect()
}
